"""Tables and pictures from `results.json`; nothing here ever sees a model."""
