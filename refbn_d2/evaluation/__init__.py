"""AP tables, intervals and reports from COCO files; independent of models and training."""
