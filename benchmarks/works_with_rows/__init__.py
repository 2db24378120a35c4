"""What people do with a model, a function a thing."""
