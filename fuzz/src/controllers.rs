//! What the controllers of machines say.

use pavo::node::power::ipmi::wire::{Command, Kind, Packet, plain, signed};
use pavo::node::power::redfish::model::{self, System};
use pavo::node::power::{Boot, Change, Device};

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

/// A page of Redfish.
pub fn redfish(data: &[u8]) -> bool {
    let Ok(page) = serde_json::from_slice::<serde_json::Value>(data) else { return false };
    let is_here = |path: &str| path.starts_with('/') && !path.starts_with("//");
    for path in model::members(&page) {
        assert!(is_here(&path) && path.bytes().all(|byte| byte.is_ascii_graphic()), "{path:?}");
        let _ = model::id(&path);
    }
    let offered = model::offered_by(&page);
    let Ok(system) = System::read("/redfish/v1/Systems/1".into(), &page) else { return false };
    for device in [Device::Default, Device::Net, Device::Disk, Device::Cdrom, Device::Bios] {
        let _ = system.boot_request(Boot { device, always: false });
    }
    let Ok(reset) = system.reset() else { return offered.is_some() };
    assert!(is_here(&reset.target) && reset.info.as_deref().is_none_or(is_here));
    for change in [Change::On, Change::Off, Change::Soft, Change::Reset] {
        if let (Ok(word), Some(offered)) = (reset.choose(change, system.state), &reset.offered) {
            assert!(offered.iter().any(|it| it == word));
        }
    }
    true
}

pub fn redfish_seeds() -> Vec<Vec<u8>> {
    let system = r##"{"PowerState": "On", "Boot": {"BootSourceOverrideEnabled": "Once",
        "BootSourceOverrideTarget": "Pxe",
        "BootSourceOverrideTarget@Redfish.AllowableValues": ["None", "Pxe", "Hdd"]},
        "Actions": {"#ComputerSystem.Reset": {"target": "/redfish/v1/Systems/1/Actions/Reset",
        "@Redfish.ActionInfo": "/redfish/v1/Systems/1/ResetActionInfo",
        "ResetType@Redfish.AllowableValues": ["On", "ForceOff", "ForceRestart"]}}}"##;
    let members = r#"{"Members": [{"@odata.id": "/redfish/v1/Systems/1"}, {"@odata.id": "//x"}]}"#;
    let info = r#"{"Parameters": [{"Name": "ResetType", "AllowableValues": ["On", "Nmi"]}]}"#;
    [system, members, info].map(|text| text.as_bytes().to_vec()).into()
}
