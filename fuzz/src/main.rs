//! `cargo run -p pavo-fuzz --bin seeds DIR`: writes the first inputs of every target into a
//! folder of its own below DIR, where cargo-fuzz looks for them.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let dir: PathBuf = std::env::args_os().nth(1).unwrap_or_else(|| "fuzz/corpus".into()).into();
    for target in pavo_fuzz::TARGETS {
        let dir = dir.join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
