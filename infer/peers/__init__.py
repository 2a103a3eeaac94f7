"""Programs of their own, in which another library reads a checkpoint."""
