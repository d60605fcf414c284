//! What commands of QMP return that are answered as they are.

/// An answer of QMP that is nothing (`{}`) or text.
pub(super) struct Outcome<T>(pub(super) T);

impl From<qapi::Empty> for Outcome<()> {
    fn from(_: qapi::Empty) -> Self {
        Self(())
    }
}

impl From<String> for Outcome<String> {
    fn from(text: String) -> Self {
        Self(text)
    }
}
