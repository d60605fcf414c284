//! Letting tasks in: who says hello gets its VM, once what that needs is there.

use std::path::PathBuf;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{News, REPORT_TIME, Step};
use crate::batch::local::Allocation;
use crate::error::{Error, Result};
use crate::host::crash;
use crate::model::vm::Nic;
use crate::ops::book::{Book, random};
use crate::ops::reach::Secrets;
use crate::ops::resolve::Job;
use crate::ops::ssh::{self, SshFiles};
use crate::vm::link::{Hello, ToTask};

impl Step {
    /// Goes on with what had to wait for the store; the rank of a task that was let in.
    ///
    /// Who is interrupted does it again.
    pub(super) async fn let_in(&mut self, book: &mut Book) -> Result<Option<u32>> {
        if let Some(store) = self.store.clone() {
            book.attach(store.clone(), &self.secrets()?).await?;
            if self.wanted.blueprint.keeps_data() {
                self.drives.open(store, &book.record.user, book.record.owner).await?;
            }
            self.store = None;
            crash::point("launch.stored")?;
        }
        let Some((hello, orders)) = self.drives.admit() else { return Ok(None) };
        let rank = hello.rank;
        if let Some(why) = self.take_drives(book, &hello).await? {
            book.hold_up(rank, why.to_string());
            for (_, orders) in self.drives.waiting() {
                // One that is gone says so by itself.
                let _ = orders.try_send(ToTask::Wait);
            }
            return Ok(None);
        }
        book.hold_up(rank, String::new());
        self.welcome(book, hello, orders).await?;
        self.drives.admitted();
        Ok(Some(rank))
    }

    /// Takes the drives of a VM; or says why not yet.
    async fn take_drives(&mut self, book: &Book, hello: &Hello) -> Result<Option<Error>> {
        let blueprint = &self.wanted.blueprint;
        let drives = blueprint.claimed(Some(hello.rank), &book.record.dir, &hello.host)?;
        self.drives.take(&drives, &book.record.host).await
    }

    /// A task has said hello; its rank if it is let in at once.
    pub(super) async fn greet(
        &mut self,
        book: &mut Book,
        hello: Hello,
        orders: mpsc::Sender<ToTask>,
    ) -> Result<Option<u32>> {
        let rank = hello.rank;
        if let Some(error) = self.unwelcome(rank) {
            tracing::warn!("{}", error.report());
            let _ = orders.try_send(ToTask::Refused { error: error.to_wire() });
            return Ok(None);
        }
        let must_claim = self.wanted.blueprint.keeps_data() && self.wanted.log_in.is_some();
        if let Some((hello, orders)) = self.drives.keep((hello, orders), must_claim) {
            self.welcome(book, hello, orders).await?;
            return Ok(Some(rank));
        }
        self.log_in();
        Ok(None)
    }

    /// Why a task of this rank gets no VM.
    fn unwelcome(&mut self, rank: u32) -> Option<Error> {
        let vms = self.wanted.blueprint.vms.len();
        if rank as usize >= vms {
            return Some(Error::system(format!("the cluster has {vms} VMs, and no vm{rank}")));
        }
        let twice = !self.met.insert(rank);
        twice.then(|| Error::system(format!("vm{rank} has a process already")))
    }

    /// A task has said who it is: its VM's record is completed and its spec sent.
    async fn welcome(
        &mut self,
        book: &mut Book,
        hello: Hello,
        orders: mpsc::Sender<ToTask>,
    ) -> Result<()> {
        crash::point("launch.hello")?;
        let rank = hello.rank as usize;
        let (Some(vm), Some((key, host_keys))) =
            (self.wanted.blueprint.vms.get(rank), self.keys.as_ref())
        else {
            return Err(Error::bug(format!("a task of rank {rank} was let in")));
        };
        let allocation = Allocation { cores: hello.cores, memory_mib: hello.memory_mib };
        let mut record = vm.record(&allocation, &hello.host);
        record.addresses = hello.nics.iter().flat_map(Nic::addresses).collect();
        record.ports = hello.ports.clone();
        record.control = hello.control;
        book.record.vms[rank] = record;
        book.touch();
        let job = Job {
            owner: book.record.owner,
            // The task knows where its host has room.
            dir: &PathBuf::new(),
            cluster_dir: &book.record.dir,
            first_cpu: None,
            allocation: &allocation,
            accel: hello.accel,
            authorized_key: &key.openssh_public,
            host_keys,
            nonce: random()?,
        };
        // Root's side knows networks, not templates.
        let model = |nic: Nic| Nic { model: vm.template.nic_model.clone(), ..nic };
        let spec = vm.spec(&job, hello.nics.iter().cloned().map(model).collect())?;
        let sent = orders.send(ToTask::Spec(Box::new(spec))).await;
        crash::point("launch.spec")?;
        self.tasks.insert(hello.rank, orders);
        // One that ended while it waited has said so when it was nobody's yet.
        if sent.is_err() {
            self.gone.push_back((Instant::now() + REPORT_TIME, hello.rank));
        }
        if self.tasks.len() == self.wanted.blueprint.vms.len() {
            self.write_ssh_files(book)?;
        }
        self.log_in();
        Ok(())
    }

    /// What commands on other hosts need.
    fn secrets(&self) -> Result<Secrets> {
        let keys = self.keys.clone();
        let (key, host_keys) = keys.ok_or_else(|| Error::bug("a step without keys has tasks"))?;
        let identity = self.wanted.identity.clone();
        Ok(Secrets { identity, key, known: ssh::public(&host_keys) })
    }

    fn write_ssh_files(&self, book: &Book) -> Result<()> {
        let Some((key, host_keys)) = &self.keys else { return Ok(()) };
        let known = ssh::public(host_keys);
        SshFiles::of_job(&book.record.dir).write(key, &book.record.vms, &known)
    }

    /// Once a host has been set up, the site knows the person.
    fn log_in(&mut self) {
        if let (Some(log_in), false) = (&self.wanted.log_in, self.logging_in) {
            self.logging_in = true;
            let (log_in, tell) = (log_in(), self.tell.clone());
            tokio::spawn(async move { tell.send(News::Store(log_in.await)).await });
        }
    }
}
