//! `pavo top`

use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::App;
use super::job::{JobSelector, Jobs};
use super::out::{Column, OutputArgs};
use super::terminal::{Input, Screen, input};
use crate::error::{Context, Error, Result};
use crate::model::job::JobRecord;
use crate::ops::jobs::choose;
use crate::ops::usage::{Doing, Rates, Watcher};

/// How often it is looked which clusters there are: at a site the scheduler is asked.
const JOBS: Duration = Duration::from_secs(10);
/// How long `--once` looks.
const ONCE: Duration = Duration::from_secs(1);

/// Show what VMs use: processors, memory, disk and network
///
/// A table of all VMs of your clusters, or of one (`-j`, `-J`), that is brought up to date
/// until `q` or Ctrl-C. `c` sorts it by processor time, `m` by memory, `v` by VM again.
///
/// CPU is what the VM's QEMU takes, 100 for each processor that is busy; MEMORY what it holds
/// of its host's, which grows as the guest touches it. Rates are bytes per second, as the guest
/// reads, writes, receives (RX) and sends (TX). A VM whose process does not answer has a `-`.
#[derive(Debug, Args)]
pub struct Top {
    #[command(flatten)]
    job: JobSelector,

    /// Seconds between two looks
    #[arg(short = 'n', long, value_name = "SECONDS", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,

    /// Look for one second, print the table, and end
    #[arg(long)]
    once: bool,

    #[command(flatten)]
    output: OutputArgs,
}

const COLUMNS: &[Column<Doing>] = &[
    Column { title: "job", text: |vm| vm.job.to_string() },
    Column { title: "vm", text: |vm| format!("vm{}", vm.rank) },
    Column { title: "state", text: |vm| or_dash(vm.state) },
    Column { title: " cpu%", text: |vm| right(5, rate(vm, |it| it.cpu_percent, percent)) },
    Column { title: "of", text: |vm| (vm.cores * 100).to_string() },
    Column {
        title: "memory",
        text: |vm| right(6, or_dash(vm.memory_bytes.map(|it| it as f64).map(size))),
    },
    Column { title: "of", text: |vm| size((vm.memory_mib << 20) as f64) },
    Column { title: "read/s", text: |vm| right(6, rate(vm, |it| it.disk_read_bytes, size)) },
    Column { title: "write/s", text: |vm| right(7, rate(vm, |it| it.disk_written_bytes, size)) },
    Column { title: " rx/s", text: |vm| right(5, rate(vm, |it| it.received_bytes, size)) },
    Column { title: " tx/s", text: |vm| right(5, rate(vm, |it| it.sent_bytes, size)) },
    Column { title: "host", text: |vm| vm.host.clone() },
];

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

fn rate(vm: &Doing, of: fn(&Rates) -> f64, show: fn(f64) -> String) -> String {
    or_dash(vm.rates.as_ref().map(|rates| show(of(rates))))
}

fn percent(value: f64) -> String {
    format!("{value:.0}")
}

fn right(width: usize, text: String) -> String {
    format!("{text:>width$}")
}

/// Bytes in at most five letters.
fn size(bytes: f64) -> String {
    let mut value = bytes.max(0.0);
    for unit in ["", "K", "M", "G"] {
        // What would be rounded to four figures is of the next unit.
        if value < 999.5 {
            return match unit {
                "" => format!("{value:.0}"),
                _ if value < 9.95 => format!("{value:.1}{unit}"),
                _ => format!("{value:.0}{unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1}T")
}

/// What the table is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Vm,
    Cpu,
    Memory,
}

impl Order {
    fn sort(self, vms: &mut [Doing]) {
        let cpu = |vm: &Doing| vm.rates.map_or(-1.0, |rates| rates.cpu_percent);
        vms.sort_by(|a, b| match self {
            Self::Vm => (a.job, a.rank).cmp(&(b.job, b.rank)),
            Self::Cpu => cpu(b).total_cmp(&cpu(a)),
            Self::Memory => b.memory_bytes.cmp(&a.memory_bytes),
        });
    }
}

impl Top {
    pub fn run(self, app: &App) -> Result<u8> {
        if self.output.output.is_some() && !self.once {
            return Err(Error::usage("a format is for one look").help("add `--once`"));
        }
        app.block_on(async {
            let known = Jobs::open(app).await?;
            let mut watcher = Watcher::default();
            if self.once {
                let jobs = self.jobs(app, &known).await?;
                watcher.look(known.store(), &jobs).await;
                tokio::time::sleep(ONCE).await;
                let vms = watcher.look(known.store(), &jobs).await;
                app.out.list(self.output, &vms, COLUMNS)?;
                return Ok(0);
            }
            self.live(app, &known, watcher).await?;
            Ok(0)
        })
    }

    /// The clusters that are meant; none is no error, unless one was named.
    async fn jobs(&self, app: &App, known: &Jobs) -> Result<Vec<JobRecord>> {
        let running = known.running(app).await?;
        let mut selector = self.job.selector(app);
        if selector.id.is_none() && selector.name.is_none() {
            return Ok(running);
        }
        selector.here = None;
        Ok(vec![choose(running, &selector)?])
    }

    async fn live(&self, app: &App, known: &Jobs, mut watcher: Watcher) -> Result<()> {
        let mut jobs = self.jobs(app, known).await?;
        let mut asked = Instant::now();
        let mut keys = Keys { input: input()?, order: Order::Vm };
        let listen = |kind| signal(kind).while_doing(|| "listening for signals".into());
        let mut resized = listen(SignalKind::window_change())?;
        let mut terminate = listen(SignalKind::terminate())?;
        let mut hung_up = listen(SignalKind::hangup())?;
        let mut ticks = interval(Duration::from_secs(self.interval));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut vms = Vec::new();
        let screen = Screen::open(&app.out)?;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let look = async {
                        if asked.elapsed() >= JOBS {
                            // What ended meanwhile is nobody's error; the table shows it.
                            jobs = self.jobs(app, known).await.unwrap_or_default();
                            asked = Instant::now();
                        }
                        watcher.look(known.store(), &jobs).await
                    };
                    // Who wants to leave does not wait for VMs that do not answer.
                    tokio::select! {
                        found = look => vms = found,
                        left = keys.left() => return left,
                        _ = terminate.recv() => return Ok(()),
                    }
                }
                _ = resized.recv() => {}
                _ = terminate.recv() => return Ok(()),
                _ = hung_up.recv() => return Ok(()),
                pressed = keys.pressed() => {
                    if pressed? {
                        return Ok(());
                    }
                }
            }
            keys.order.sort(&mut vms);
            screen.draw(&self.title(&jobs, &vms), &app.out.table(&vms, COLUMNS))?;
        }
    }

    fn title(&self, jobs: &[JobRecord], vms: &[Doing]) -> String {
        let busy: f64 = vms.iter().filter_map(|vm| vm.rates).map(|it| it.cpu_percent).sum();
        let held: u64 = vms.iter().filter_map(|vm| vm.memory_bytes).sum();
        let many = |count: usize, what: &str| {
            format!("{count} {what}{}", if count == 1 { "" } else { "s" })
        };
        format!(
            "pavo: {} of {}, {busy:.0} % CPU, {} memory; every {} s; q quits",
            many(vms.len(), "VM"),
            many(jobs.len(), "cluster"),
            size(held as f64),
            self.interval
        )
    }
}

/// What is typed.
struct Keys {
    input: Input,
    order: Order,
}

impl Keys {
    /// Waits for a key; whether it is one to leave by.
    async fn pressed(&mut self) -> Result<bool> {
        let mut typed = [0; 16];
        let count = self.input.read(&mut typed).await;
        let count = count.while_doing(|| "reading the terminal".into())?;
        for key in &typed[..count] {
            match key {
                // Ctrl-C, Ctrl-D, as a raw terminal sends them.
                b'q' | b'Q' | 3 | 4 => return Ok(true),
                b'c' => self.order = Order::Cpu,
                b'm' => self.order = Order::Memory,
                b'v' => self.order = Order::Vm,
                _ => {}
            }
        }
        Ok(count == 0)
    }

    /// Waits for one to leave by.
    async fn left(&mut self) -> Result<()> {
        while !self.pressed().await? {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_rounded_into_the_next_unit() {
        for (bytes, text) in [
            (0.0, "0"),
            (999.4, "999"),
            (999.5, "1.0K"),
            (1024.0 * 1024.0, "1.0M"),
            (9.96 * 1024.0, "10K"),
            (1023.0 * 1024.0, "1.0M"),
            (128.0 * 1048576.0, "128M"),
            (5.0 * 1099511627776.0, "5.0T"),
            (-1.0, "0"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
