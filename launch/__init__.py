"""Launch any command of the project as a job, locally or on Slurm."""
