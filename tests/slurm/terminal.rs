//! A command of alice's at a terminal on the login host.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::world::Site;

/// How long what is waited for may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// It, running.
pub struct Terminal {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Terminal {
    pub fn open(site: &Site, command: &str) -> Self {
        let argv = ["env", "SHELL=/bin/bash", "script", "-qefc", command, "/dev/null"];
        let mut command = site.lab.login().command(Some("alice"), &argv).unwrap();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut screen = child.stdout.take().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let ours = said.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                *ours.lock().unwrap() += &String::from_utf8_lossy(&bytes[..count]);
            }
        });
        Self { child, said }
    }

    /// All that was on the screen.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Waits until `text` is on the screen.
    #[track_caller]
    pub fn sees(&self, text: &str) {
        let start = Instant::now();
        while !self.said().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?}: {}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the shell's prompt, so that no program before takes the keys; then types.
    #[track_caller]
    pub fn enters(&mut self, command: &str) {
        let start = Instant::now();
        while !self.said().ends_with("$ ") {
            assert!(start.elapsed() < PATIENCE, "no prompt: {}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.types(&format!("{command}\n"));
    }

    pub fn types(&mut self, keys: &str) {
        self.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for its end; the exit code.
    #[track_caller]
    pub fn ends(&mut self) -> i32 {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(start.elapsed() < PATIENCE, "it does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended already, or the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
