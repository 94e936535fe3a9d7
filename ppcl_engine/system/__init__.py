"""What touches the machine: files, processes, progress, devices. It knows nothing of models."""
