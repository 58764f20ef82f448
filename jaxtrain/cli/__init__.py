"""What only scripts need: flags, the run folder, the compilation cache, tables and plots."""
