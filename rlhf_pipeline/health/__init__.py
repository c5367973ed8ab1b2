"""Problems during training, by name: watches read the metrics of a stage and say what a problem usually means."""
