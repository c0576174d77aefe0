"""What belongs to this machine and its user: settings, model folders, measurements that are worth keeping."""
