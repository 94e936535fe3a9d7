"""What touches the machine: files, processes, progress, devices. Knows no model."""
