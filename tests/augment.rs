//! Random changes to training pictures.

use hone::data::{Augment, Pixels, Preprocess, generator};
use proptest::prelude::*;

/// A picture whose red tells the column and whose green tells the row.
fn ramp(width: u32, height: u32) -> Pixels {
    let pixel = |i: u32| [(i % width * 255 / width) as u8, (i / width * 255 / height) as u8, 128];
    Pixels { width, height, data: (0..width * height).flat_map(pixel).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn augmented_pictures_fit_whatever_the_original(width in 1u32..300, height in 1u32..300, seed: u64) {
        let preprocess = Preprocess::imagenet(64);
        for augment in [Augment::None, Augment::Flip, Augment::Standard, Augment::Strong] {
            let draw = |index| augment.apply(&ramp(width, height), &preprocess, generator(seed, 3, index)).unwrap();
            prop_assert_eq!(draw(7).len(), 64 * 64 * 3);
            prop_assert_eq!(draw(7), draw(7), "the same picture in the same epoch is changed alike");
        }
    }
}

#[test]
fn augmentation_does_what_its_name_says() {
    let preprocess = Preprocess::imagenet(64);
    let picture = ramp(200, 150);
    let draws = |augment: Augment| -> Vec<Vec<u8>> {
        (0..200).map(|i| augment.apply(&picture, &preprocess, generator(1, 1, i)).unwrap()).collect()
    };
    let plain = preprocess.apply(&picture).unwrap();
    assert!(draws(Augment::None).iter().all(|p| *p == plain));
    let mirrored: Vec<u8> = plain
        .chunks_exact(64 * 3)
        .flat_map(|row| row.chunks_exact(3).rev().flatten().copied().collect::<Vec<_>>())
        .collect();
    let flips = draws(Augment::Flip);
    let count = flips.iter().filter(|p| **p == mirrored).count();
    assert!((70..130).contains(&count) && flips.iter().all(|p| *p == plain || *p == mirrored), "{count} of 200");
    // A random part covers a smaller range of columns than the centre crop does, now and then a larger one.
    let range = |p: &[u8]| {
        let red = || p.iter().step_by(3);
        i32::from(*red().max().unwrap()) - i32::from(*red().min().unwrap())
    };
    let standard = draws(Augment::Standard);
    let smaller = standard.iter().filter(|p| range(p) < range(&plain)).count();
    assert!(smaller > 80 && smaller < 200, "{smaller}");
    assert!(standard.iter().all(|p| p.iter().skip(2).step_by(3).all(|&blue| blue.abs_diff(128) <= 1)), "colours stay");
    let strong = draws(Augment::Strong);
    let recoloured = strong.iter().filter(|p| p.iter().skip(2).step_by(3).any(|&blue| blue.abs_diff(128) > 4)).count();
    assert!(recoloured > 150, "{recoloured}");
    let gray = preprocess.mean.map(|m| (m * 255.0).round() as u8);
    let erased = strong.iter().filter(|p| p.chunks_exact(3).filter(|pixel| **pixel == gray).count() >= 64).count();
    assert!((25..80).contains(&erased), "about a quarter of 200: {erased}");
}
