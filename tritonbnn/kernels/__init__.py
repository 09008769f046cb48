"""tritonbnn.kernels"""
