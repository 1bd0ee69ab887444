"""What every command needs of its process: log, signals, errors, devices, other processes."""
