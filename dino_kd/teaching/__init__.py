"""From the settings of a distillation to its teachers, its terms, and its batches."""
