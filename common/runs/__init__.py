"""What carries a run: flags, files, folder, pictures, machine. Changing the science never needs it."""
