"""What scripts need around training: flags, run folder, progress, tables, plots, signals."""
