"""tritonbnn.models"""
