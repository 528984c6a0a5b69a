"""What `fit` trains: one Task object per objective."""
