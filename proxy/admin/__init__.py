"""What an administrator sees over HTTP: metrics and health."""
