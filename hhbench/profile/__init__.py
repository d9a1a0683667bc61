"""What an attention costs at each length, and from which length on it is faster than softmax: `hhbench profile`."""
