//! One target of `make fuzz`; what it does is in `pavo_fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pavo_fuzz::run("pcocc_agent", data));
