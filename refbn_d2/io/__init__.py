"""Safe reading and writing of files: YAML, JSON, images, atomic writes, locks. Without torch."""
