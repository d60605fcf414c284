//! The plugin inside a real Slurm: the table of the crate's documentation, row by row.
//!
//! In pavo's place stands a script that writes down what it is asked and answers as the
//! test says: what is tested here is the plugin's side of that talk.

mod child;
mod failures;
mod load;
mod steps;
mod world;
