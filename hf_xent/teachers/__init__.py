"""Floor 3: teachers, one file per kind. A teacher answers a batch with targets for a distillation loss."""
