"""AP tables, intervals and reports from COCO files. Knows no model and no training loop."""
