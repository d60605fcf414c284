//! The word that was meant.

/// The word most like `wrong`, if one is alike enough to have been meant.
pub fn nearest<'a>(wrong: &str, words: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let most = wrong.chars().count().div_ceil(3);
    let distance = |word: &str| strsim::osa_distance(&wrong.to_lowercase(), &word.to_lowercase());
    let near = words.into_iter().map(|word| (distance(word), word));
    near.filter(|(distance, _)| *distance <= most).min().map(|(_, word)| word.to_owned())
}
