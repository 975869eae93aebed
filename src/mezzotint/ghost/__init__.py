"""The simulated GPU: CUDA's rules on tensors that have shape, dtype and strides, but no data."""
