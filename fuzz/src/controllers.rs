//! What the controllers of machines say.

use pavo::node::power::ipmi::wire::{Command, Kind, Packet, plain, signed};

/// A controller's packet, and the message in it.
pub fn ipmi(data: &[u8]) -> bool {
    let Some(packet) = Packet::read(data) else { return false };
    assert!(packet.payload.len() < data.len());
    let _ = (packet.addressee(), packet.is_bare_refusal());
    for length in [0, 12, 16, 20, 32] {
        if let Some((signed, code)) = packet.signed(length) {
            assert_eq!((signed.len() + code.len() + 4, code.len()), (data.len(), length));
            // The payload is in what is signed, or it would be anybody's.
            assert!(signed.len() >= 12 + packet.payload.len());
        }
    }
    let command = Command { function: 0, command: 1, data: &[] };
    if let Some((_, data)) = command.answer(5, packet.payload) {
        assert!(data.len() < packet.payload.len());
    }
    true
}

pub fn ipmi_seeds() -> Vec<Vec<u8>> {
    let answer = Command { function: 1, command: 1, data: &[0, 1, 0, 0] }.message(5);
    let code = |_: &[u8]| vec![0xaa; 12];
    let open = [&[0, 0, 3, 0, 1, 2, 3, 4, 1, 0, 0, 0][..], &[0, 0, 0, 8, 1, 0, 0, 0].repeat(3)];
    vec![
        plain(Kind::OpenResponse, &open.concat()),
        plain(Kind::OpenResponse, &[0, 4]),
        plain(Kind::Rakp2, &[&[0, 0, 0, 0, 1, 2, 3, 4][..], &[7; 52]].concat()),
        plain(Kind::Rakp4, &[&[0, 0, 0, 0, 1, 2, 3, 4][..], &[7; 12]].concat()),
        signed(0x0403_0201, 1, &answer, code),
    ]
}
