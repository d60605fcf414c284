//! What QEMU tells of itself by QMP, as events of the machine.

use serde::Deserialize;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::super::agent::{Agent, DEVICE, Port, pcocc};
use super::super::checkpoint::{self, Restored};
use super::super::clone::Newborn;
use super::super::machine::{self, Event};
use super::super::qmp;
use crate::error::{Context, Result};
use crate::model::vm::VmSpec;

/// How a VM is to begin.
pub(super) struct Beginning {
    /// Whether its guest is to run.
    run: bool,
    /// What it goes on from.
    restored: Option<Restored>,
    /// What its guest is to be told.
    newborn: Option<Newborn>,
}

impl Beginning {
    pub(super) fn of(spec: &VmSpec, agent: &Agent, restored: Option<Restored>) -> Self {
        let restore = spec.restore.as_deref();
        let run = !spec.paused && !restore.is_some_and(|restore| restore.paused);
        Self { run, restored, newborn: Newborn::of(spec, agent) }
    }

    /// Lets QEMU be what it is to go on from; then others may talk to it.
    async fn begin(
        self,
        qmp: qmp::Client,
        client: watch::Sender<Option<qmp::Client>>,
        post: mpsc::Sender<Event>,
    ) {
        let run = self.run;
        let restored = self.restored;
        let begun = match self.newborn {
            None => Self::restore(restored, &qmp, &post).await.map(|()| Event::Greeted { run }),
            Some(newborn) => {
                let begun = Self::bear(newborn, restored, &qmp, &client, &post);
                begun
                    .await
                    .map(|()| Event::Became)
                    .while_doing(|| "starting it from its snapshot".into())
            }
        };
        let event = begun.unwrap_or_else(|error| {
            let wire = error.to_wire();
            Event::Broken { why: [vec![wire.what], wire.because].concat().join(": ") }
        });
        if matches!(event, Event::Greeted { .. }) {
            client.send_replace(Some(qmp));
        }
        let _ = post.send(event).await;
    }

    async fn restore(
        restored: Option<Restored>,
        qmp: &qmp::Client,
        post: &mpsc::Sender<Event>,
    ) -> Result<()> {
        let Some(restored) = restored else { return Ok(()) };
        let _ = post.send(Event::Loading).await;
        checkpoint::load(qmp, restored).await
    }

    /// Restores the memory of another, and lets its guest become this one.
    async fn bear(
        newborn: Newborn,
        restored: Option<Restored>,
        qmp: &qmp::Client,
        client: &watch::Sender<Option<qmp::Client>>,
        post: &mpsc::Sender<Event>,
    ) -> Result<()> {
        Self::restore(restored, qmp, post).await?;
        newborn.link(qmp, false).await?;
        client.send_replace(Some(qmp.clone()));
        let _ = post.send(Event::Strange).await;
        newborn.become_itself(qmp).await
    }
}

/// What is known of the ports of agents: ours and pcocc's.
pub(super) struct Ports([(&'static str, watch::Sender<Port>); 2]);

impl Ports {
    pub(super) fn new() -> (Self, [watch::Receiver<Port>; 2]) {
        let ports = [DEVICE, pcocc::DEVICE].map(|id| (id, watch::Sender::new(Port::default())));
        let opened = ports.each_ref().map(|(_, port)| port.subscribe());
        (Self(ports), opened)
    }

    fn change(&self, change: &PortChange) {
        let found = self.0.iter().find(|(id, _)| *id == change.id);
        if let Some((_, port)) = found {
            port.send_modify(|port| *port = Port { changes: port.changes + 1, open: change.open });
        }
    }
}

/// Speaks QMP until it closes, and passes on what concerns the machine.
pub(super) async fn listen(
    stream: UnixStream,
    client: watch::Sender<Option<qmp::Client>>,
    post: mpsc::Sender<Event>,
    ports: Ports,
    beginning: Beginning,
) {
    // The machine has the deadline; this one only ends the task after it.
    let connected = qmp::connect(stream, machine::START * 2).await;
    let (qmp, mut events) = match connected {
        Ok(connected) => connected,
        Err(failure) => {
            let _ = post.send(Event::Broken { why: failure.to_string() }).await;
            return;
        }
    };
    // Beside us, since events have to be taken meanwhile. Without QEMU it ends.
    tokio::spawn(beginning.begin(qmp, client.clone(), post.clone()));
    let mut disk_error = None;
    while let Some(event) = events.recv().await {
        let event = match event.name.as_str() {
            "BLOCK_IO_ERROR" => {
                disk_error = event.data::<DiskError>();
                continue;
            }
            "VSERPORT_CHANGE" => {
                if let Some(change) = event.data::<PortChange>() {
                    ports.change(&change);
                }
                continue;
            }
            "RESUME" => Event::Resumed,
            "STOP" => Event::Suspended { why: why_suspended(disk_error.take()) },
            "SHUTDOWN" => shut_down(event.data()),
            _ => continue,
        };
        let _ = post.send(event).await;
    }
    client.send_replace(None);
    let _ = post.send(Event::Broken { why: qmp::Failure::Lost.to_string() }).await;
}

#[derive(Deserialize)]
struct PortChange {
    id: String,
    open: bool,
}

/// The part of BLOCK_IO_ERROR that is shown.
#[derive(Deserialize)]
struct DiskError {
    #[serde(default)]
    nospace: bool,
    reason: String,
}

fn why_suspended(error: Option<DiskError>) -> String {
    match error {
        Some(DiskError { nospace: true, .. }) => {
            "the file system that holds its disk is full".into()
        }
        Some(error) => format!("its disk failed: {}", error.reason),
        None => String::new(),
    }
}

#[derive(Deserialize)]
struct Shutdown {
    guest: bool,
    reason: String,
}

fn shut_down(shutdown: Option<Shutdown>) -> Event {
    match shutdown {
        Some(Shutdown { guest: true, reason }) if reason == "guest-shutdown" => {
            Event::PoweredOff { why: "the guest powered off".into() }
        }
        Some(Shutdown { guest: true, .. }) => {
            Event::ShuttingDown { why: "the guest shut down".into() }
        }
        Some(Shutdown { reason, .. }) => {
            Event::ShuttingDown { why: format!("QEMU ends ({reason})") }
        }
        None => Event::ShuttingDown { why: "QEMU ends".into() },
    }
}
