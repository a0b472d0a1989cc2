"""`quantkit validate`: does a quantized checkpoint still answer as its baseline does?"""
