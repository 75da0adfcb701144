"""What a running job tells: catalogue of metrics, exporter, records, progress."""
