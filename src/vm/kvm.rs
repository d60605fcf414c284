//! Whether KVM really runs guests here.
//!
//! That `/dev/kvm` opens proves little. Where the host has no virtualisation of
//! its own (a nested machine, `kvm_pvm`), a VM can be created and even firmware
//! runs, instruction by instruction in the kernel's emulator, yet no operating
//! system ever boots. So the probe does what the first milliseconds of a kernel
//! do: it enters long mode with its own page tables, takes a page fault through
//! its own interrupt table, and then computes for long enough that only a
//! processor, not an emulator, finishes in time.
//!
//! A broken KVM may also never come back: the probe is a process of its own
//! ([`probe`]), killed at its deadline.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use tokio::io::AsyncReadExt;

/// Runs [`probe_in_this_process`] as `exe internal kvm-probe`, for `deadline` at
/// most. The child's standard error says why not, and its exit status whether.
///
/// # Errors
/// Why KVM is not to be used, for people to read.
pub async fn probe(exe: &Path, deadline: Duration) -> Result<(), String> {
    let mut command = std::process::Command::new(exe);
    command.args(["internal", "kvm-probe"]);
    outcome(command, deadline).await
}

/// What a probing child says, or why it could not.
async fn outcome(mut command: std::process::Command, deadline: Duration) -> Result<(), String> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    crate::host::spawn::die_with_parent(&mut command);
    let mut command = tokio::process::Command::from(command);
    let mut child = command
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("the probe does not start: {error}"))?;
    let mut stderr = child.stderr.take().expect("it is piped").take(4096);
    let outcome = async {
        let mut why = String::new();
        // Text that cannot be read is replaced by the exit status below.
        let _ = stderr.read_to_string(&mut why).await;
        (child.wait().await, why)
    };
    match tokio::time::timeout(deadline, outcome).await {
        Ok((Ok(status), _)) if status.success() => Ok(()),
        Ok((Ok(status), why)) if why.trim().is_empty() => {
            Err(format!("the probe ended with {status}"))
        }
        Ok((Ok(_), why)) => Err(why.trim().to_owned()),
        Ok((Err(error), _)) => Err(format!("the probe is lost: {error}")),
        // `kill_on_drop` ends it.
        Err(_) => Err(format!("guest code did not finish within {deadline:?}")),
    }
}

/// Creates a VM and runs the guest code below in it. Does not return where the
/// guest never stops: call it in a process that somebody else can kill.
///
/// # Errors
/// Why KVM is not to be used, for people to read.
pub fn probe_in_this_process() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm does not open: {error}"))?;
    if kvm.get_api_version() != 12 {
        return Err(format!("KVM speaks version {} and not 12", kvm.get_api_version()));
    }
    // Declared before the VM, so that it outlives the mapping.
    let mut memory = GuestMemory::new();
    let vm = kvm.create_vm().map_err(|error| format!("no VM can be created: {error}"))?;
    memory.map(&vm).map_err(|error| format!("no memory can be given to a VM: {error}"))?;
    let mut cpu = start_state(&kvm, &vm).map_err(|error| format!("no CPU can be made: {error}"))?;
    match cpu.run() {
        Ok(VcpuExit::IoOut(PORT, data)) if data == expected_result().to_le_bytes() => {}
        Ok(VcpuExit::IoOut(PORT, _)) => return Err("guest code computes wrong results".into()),
        Ok(exit) => return Err(format!("guest code stopped: {exit:?}")),
        Err(error) => return Err(format!("guest code does not run: {error}")),
    }
    match memory.word(FAULTS) {
        1 => Ok(()),
        faults => Err(format!("the guest took {faults} page faults and not 1")),
    }
}

/// Where things lie in the guest's memory.
const SIZE: usize = 0x4_0000;
const GDT: usize = 0x1000;
const IDT: usize = 0x2000;
const PML4: usize = 0x3000;
const PDPT: usize = 0x4000;
const PD: usize = 0x5000;
const PT: usize = 0x6000;
const CODE: usize = 0x8000;
const STACK: usize = 0x1_0000;
const DATA: usize = 0x2_0000;
/// Counts page faults.
const FAULTS: usize = DATA + 0x1000;
/// Not mapped until the guest's page-fault handler does it.
const LAZY_PAGE: usize = 0x3_0000;

/// Where the guest writes its result.
const PORT: u16 = 0x505;
/// Some milliseconds for a processor, many seconds for KVM's emulator.
const ROUNDS: u32 = 2_000_000;
const MULTIPLIER: u32 = 1_664_525;
const INCREMENT: u32 = 1_013_904_223;
/// Written to the lazy page and read back into the result.
const MARK: u32 = 0x7061_766f;

#[expect(unsafe_code, reason = "the guest's own code, never called by this program")]
mod guest {
    use super::*;

    // Entered in 32-bit protected mode with flat segments, as a kernel is by its
    // boot loader. It is copied to `CODE`: every address in it is relative or
    // computed from that.
    core::arch::global_asm!(
        ".pushsection .rodata.pavo_kvm_guest, \"a\"",
        // Global, because optimising across the program moves who reads them.
        ".globl pavo_kvm_guest, pavo_kvm_guest_end",
        ".hidden pavo_kvm_guest, pavo_kvm_guest_end",
        ".code32",
        ".balign 256",
        "pavo_kvm_guest:",
        // Long mode: physical address extension, page tables, EFER.LME, paging.
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, {pml4}",
        "mov cr3, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "push 0x10",
        "push {code} + 256",
        "retf",
        // The handler of page faults: counts, maps the lazy page, tries again.
        ".code64",
        "2:",
        "push rax",
        "inc dword ptr [{faults}]",
        "mov eax, {lazy} + 3",
        "mov [{pt} + {lazy} / 4096 * 8], rax",
        "invlpg [{lazy}]",
        "pop rax",
        "add rsp, 8",
        "iretq",
        // In long mode: the interrupt table, a page fault, CPUID, work.
        ".balign 256",
        "mov edi, {idt} + 14 * 16",
        "lea rax, [rip + 2b]",
        "mov [rdi], ax",
        "mov dword ptr [rdi + 2], 0x8e000010",
        "mov qword ptr [rdi + 6], 0",
        "lidt [rip + 5f]",
        "mov dword ptr [{lazy}], {mark}",
        "xor eax, eax",
        "cpuid",
        "mov ecx, {rounds}",
        "mov eax, [{lazy}]",
        "4:",
        "imul eax, eax, {multiplier}",
        "add eax, {increment}",
        "movzx edx, cl",
        "mov [{data} + rdx * 8], eax",
        "dec ecx",
        "jnz 4b",
        "mov edx, {port}",
        "out dx, eax",
        "hlt",
        "5:",
        ".word 15 * 16 - 1",
        ".quad {idt}",
        "pavo_kvm_guest_end:",
        ".popsection",
        pml4 = const PML4,
        code = const CODE,
        faults = const FAULTS,
        lazy = const LAZY_PAGE,
        pt = const PT,
        idt = const IDT,
        data = const DATA,
        mark = const MARK,
        rounds = const ROUNDS,
        multiplier = const MULTIPLIER,
        increment = const INCREMENT,
        port = const PORT,
    );

    unsafe extern "C" {
        static pavo_kvm_guest: u8;
        static pavo_kvm_guest_end: u8;
    }

    /// The code above, as bytes.
    pub fn code() -> &'static [u8] {
        let (start, end) = (&raw const pavo_kvm_guest, &raw const pavo_kvm_guest_end);
        // SAFETY: both labels are in one read-only section, in this order, and
        // what lies between them never changes.
        unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
    }
}

/// What the guest's loop computes.
fn expected_result() -> u32 {
    (0..ROUNDS).fold(MARK, |x, _| x.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT))
}

/// The guest's memory, a whole number of pages.
struct GuestMemory(Box<[Page]>);

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl GuestMemory {
    /// Memory with descriptor tables, page tables and code.
    fn new() -> Self {
        let mut memory = Self(vec![Page([0; 4096]); SIZE / 4096].into());
        // Flat segments: 8 is 32-bit code, 0x10 64-bit code, 0x18 data.
        for (index, descriptor) in
            [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64]
                .into_iter()
                .enumerate()
        {
            memory.write(GDT + index * 8, descriptor);
        }
        // Present and writable; the memory is mapped to itself but for one page.
        memory.write(PML4, PDPT as u64 | 3);
        memory.write(PDPT, PD as u64 | 3);
        memory.write(PD, PT as u64 | 3);
        for page in (0..SIZE).step_by(4096).filter(|page| *page != LAZY_PAGE) {
            memory.write(PT + page / 4096 * 8, page as u64 | 3);
        }
        let code = guest::code();
        for (index, byte) in code.iter().enumerate() {
            memory.0[(CODE + index) / 4096].0[(CODE + index) % 4096] = *byte;
        }
        memory
    }

    fn write(&mut self, at: usize, value: u64) {
        self.0[at / 4096].0[at % 4096..][..8].copy_from_slice(&value.to_le_bytes());
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = &self.0[at / 4096].0[at % 4096..][..4];
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }

    fn map(&mut self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: self.0.as_mut_ptr() as u64,
        };
        #[expect(unsafe_code)]
        // SAFETY: the memory is ours, page-aligned, as large as said, and lives
        // longer than the VM: the caller declares it first.
        unsafe {
            vm.set_user_memory_region(region)
        }
    }
}

/// A CPU in 32-bit protected mode at the start of the code.
fn start_state(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, kvm_ioctls::Error> {
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    let cpu = vm.create_vcpu(0)?;
    cpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = flat(0x18, 3);
    let mut system = cpu.get_sregs()?;
    system.cs = flat(8, 11);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.gdt.base = GDT as u64;
    system.gdt.limit = 4 * 8 - 1;
    system.cr0 |= 1;
    cpu.set_sregs(&system)?;
    let registers =
        kvm_regs { rip: CODE as u64, rsp: STACK as u64, rflags: 2, ..Default::default() };
    cpu.set_regs(&registers)?;
    Ok(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome of a shell script in the child's place.
    async fn probed(script: &str, deadline: Duration) -> Result<(), String> {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script]);
        outcome(command, deadline).await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn the_child_decides_and_says_why() {
        assert_eq!(probed("exit 0", LONG).await, Ok(()));
        // `echo internal kvm-probe`
        assert_eq!(probe(Path::new("echo"), LONG).await, Ok(()));
        let no = probed("echo no luck >&2; exit 5", LONG).await;
        assert_eq!(no, Err("no luck".into()));
        let silent = probed("kill -9 $$", LONG).await.unwrap_err();
        assert!(silent.contains("signal: 9"), "{silent}");
        let missing = probe(Path::new("/no/probe"), LONG).await.unwrap_err();
        assert!(missing.starts_with("the probe does not start"), "{missing}");
    }

    #[tokio::test]
    async fn a_child_that_hangs_is_killed_at_the_deadline() {
        let no = probed("exec sleep 600", Duration::from_millis(100)).await.unwrap_err();
        assert_eq!(no, "guest code did not finish within 100ms");
    }

    /// The child of the test below.
    #[test]
    fn probe_in_a_child() {
        if std::env::var_os("PAVO_TEST_KVM_PROBE").is_some() {
            let outcome = probe_in_this_process();
            std::process::exit(i32::from(outcome.is_err()));
        }
        // In a test run it only proves that the guest is assembled whole.
        let code = guest::code();
        assert_eq!(code.len() % 256, code.len() - 256, "the second half starts at 256");
        assert!(code.ends_with(&(IDT as u64).to_le_bytes()));
    }

    #[tokio::test]
    async fn kvm_is_trusted_only_where_a_processor_stands_behind_it() {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let virtualises = cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        let may_open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let exe = std::env::current_exe().unwrap();
        let name = "vm::kvm::tests::probe_in_a_child";
        let script = format!("PAVO_TEST_KVM_PROBE=1 exec '{}' --exact {name}", exe.display());
        let outcome = probed(&script, Duration::from_secs(2)).await;
        assert_eq!(outcome.is_ok(), virtualises && may_open, "{outcome:?}");
    }
}
