//! A node's few interfaces, by name.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::Nic;

/// Interfaces in the order of their names: a list, because a map's first entry takes the room
/// of eleven, which a hundred thousand nodes have not to spare.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nics(Box<[(String, Nic)]>);

impl Nics {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Nic)> {
        self.0.iter().map(|(name, nic)| (name.as_str(), nic))
    }

    pub fn values(&self) -> impl Iterator<Item = &Nic> {
        self.0.iter().map(|(_, nic)| nic)
    }

    pub fn get(&self, name: &str) -> Option<&Nic> {
        self.iter().find(|(it, _)| *it == name).map(|(_, nic)| nic)
    }
}

impl std::ops::Index<&str> for Nics {
    type Output = Nic;

    /// # Panics
    /// When there is no such interface.
    fn index(&self, name: &str) -> &Nic {
        self.get(name).unwrap_or_else(|| panic!("no interface `{name}`"))
    }
}

impl FromIterator<(String, Nic)> for Nics {
    fn from_iter<I: IntoIterator<Item = (String, Nic)>>(nics: I) -> Self {
        let map: std::collections::BTreeMap<String, Nic> = nics.into_iter().collect();
        Self(map.into_iter().collect())
    }
}

impl Serialize for Nics {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.0.len()))?;
        self.iter().try_for_each(|(name, nic)| map.serialize_entry(name, nic))?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Nics {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Nics;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("interfaces by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Nics, A::Error> {
                let mut nics = Vec::new();
                while let Some(entry) = map.next_entry::<String, Nic>()? {
                    nics.push(entry);
                }
                Ok(nics.into_iter().collect())
            }
        }
        from.deserialize_map(Names)
    }
}
