"""What a run trains: the parts of an adapter, or the weights of networks; and the files that these become."""
