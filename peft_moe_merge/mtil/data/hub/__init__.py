"""The MTIL benchmark on the Hugging Face Hub: `table.py` says what there is, `load.py` loads it, `prefetch.py` ahead."""
