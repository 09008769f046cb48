"""tritonbnn.nn"""
