"""Services for one user on one machine: settings, the library of model files, stored hashes and measurements."""
