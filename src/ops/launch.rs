//! The launcher: starts a cluster, follows it, ends it.
//!
//! [`Cluster`] is made in steps so that whatever interrupts it leaves by one door:
//!
//! ```text
//! Cluster::here ─┐
//!                ├► start ─► wait_until(running | ssh) ─► until_over ─► end
//! Cluster::step ─┘     └──────────┴── any failure, signal, limit ──────►─┘
//! ```
//!
//! Where it runs makes a difference to how it is started and ended, and to nothing else:
//! [`Here`] on this machine, [`Step`] as a step of a Slurm job on many.

use std::time::Duration;

use tokio::sync::watch;

use super::book::Book;
use super::complaints::Ended;
use super::drives::Claims;
use super::here::{self, Here};
use super::step::{self, Step};
use crate::error::{Error, Result};
use crate::model::job::VmStatus;

/// Where a cluster runs.
#[derive(Debug)]
enum Ground {
    Here(Box<Here>),
    Step(Box<Step>),
}

/// A cluster, from its first file to its last.
#[derive(Debug)]
pub struct Cluster {
    pub book: Book,
    ground: Ground,
    /// On this machine; a step has its own.
    drives: Option<Claims>,
    /// Whether guests keep data that they should write before they end.
    pub keeps_data: bool,
}

impl Cluster {
    /// A cluster on this machine, of which nothing exists yet.
    pub fn here(mut book: Book, wanted: here::Wanted) -> Self {
        let keeps_data = wanted.blueprint.keeps_data();
        let here = Here::new(wanted);
        here.describe(&mut book);
        Self { book, ground: Ground::Here(Box::new(here)), drives: None, keeps_data }
    }

    /// A cluster as a step of the Slurm job we are in, of which nothing exists yet.
    pub fn step(mut book: Book, wanted: step::Wanted) -> Self {
        let keeps_data = wanted.blueprint.keeps_data();
        let step = Step::new(wanted);
        step.describe(&mut book);
        Self { book, ground: Ground::Step(Box::new(step)), drives: None, keeps_data }
    }

    /// Builds the network and starts every VM's process.
    pub async fn start(&mut self) -> Result<()> {
        match &mut self.ground {
            Ground::Here(here) => {
                self.drives = here.take_drives(&self.book).await?;
                here.start(&mut self.book).await
            }
            Ground::Step(step) => step.start(&mut self.book).await,
        }
    }

    /// Waits for the next news of a VM and records it. Safe to drop.
    pub async fn next_report(&mut self) -> Result<u32> {
        match &mut self.ground {
            Ground::Here(here) => {
                let lost = async {
                    match &mut self.drives {
                        Some(drives) => drives.lost().await,
                        None => std::future::pending().await,
                    }
                };
                let report = tokio::select! {
                    report = here.next(&self.book.record.dir) => report?,
                    error = lost => return Err(error),
                };
                self.book.report(report).await
            }
            Ground::Step(step) => step.next(&mut self.book).await,
        }
    }

    /// Records a VM's state, here and in the store.
    pub async fn set_state(&mut self, rank: u32, status: VmStatus) -> Result<()> {
        self.book.set_state(rank, status).await
    }

    /// What is stored is as far as what is known: for whoever reads it next.
    pub async fn settle(&mut self) -> Result<()> {
        self.book.flush().await
    }

    /// Takes the error of the first VM that failed, if one did.
    pub fn take_failure(&mut self) -> Option<(u32, Error)> {
        self.book.take_failure()
    }

    /// Whether every VM has ended.
    pub fn is_over(&self) -> bool {
        self.book.is_over()
    }

    /// Whether every guest has ended; some VMs may be kept.
    pub fn is_down(&self) -> bool {
        self.book.is_down()
    }

    /// Why the scheduler ends the cluster, if it does.
    pub fn ended(&self) -> Option<Ended> {
        match &self.ground {
            Ground::Here(_) => None,
            Ground::Step(step) => step.ended(),
        }
    }

    /// The same, as soon as it is known; a channel whose other end is gone where there is no
    /// scheduler.
    pub fn word(&self) -> watch::Receiver<Option<Ended>> {
        match &self.ground {
            Ground::Here(_) => watch::channel(None).1,
            Ground::Step(step) => step.word(),
        }
    }

    /// Ends the cluster, whatever state it is in, and removes all of it. Guests may shut
    /// down for `grace` first.
    pub async fn end(self, grace: Duration) -> Result<()> {
        let ended = match self.ground {
            Ground::Here(here) => here.end(&self.book, grace).await,
            Ground::Step(step) => step.end(&self.book, grace).await,
        };
        if let Some(drives) = self.drives {
            drives.release().await;
        }
        ended
    }
}
