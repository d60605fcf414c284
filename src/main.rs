//! Parses, runs, reports, chooses the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    pavo::cli::main()
}
