"""tritonbnn.ops"""
