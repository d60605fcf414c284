//! Slurm's hook into pavo.
