//! Precision, recall, F1 and top-5 by hand.

use hone::train::Confusion;

#[test]
fn figures_of_a_confusion() {
    let mut confusion = Confusion::new(3);
    // True classes 0 0 0 1 1 2, taken for 0 0 1 1 0 0.
    let logits =
        [[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 9.0, 1.0], [5.0, 1.0, 2.0], [5.0, 1.0, 2.0f32]];
    confusion.add(logits.as_flattened(), &[0, 0, 0, 1, 1, 2]);
    assert_eq!(confusion.counts, [[2, 1, 0], [1, 1, 0], [1, 0, 0]]);
    let m = confusion.class_metrics();
    assert_eq!((m[0].precision, m[0].recall, m[0].support), (Some(0.5), Some(2.0 / 3.0), 3));
    assert_eq!(m[0].f1, Some(4.0 / 7.0));
    assert_eq!((m[1].precision, m[1].recall, m[1].f1), (Some(0.5), Some(0.5), Some(0.5)));
    assert_eq!((m[2].precision, m[2].recall, m[2].f1), (None, Some(0.0), Some(0.0)), "never taken for");
    assert_eq!(confusion.top5_accuracy(), None, "three classes are always among the first five");
}

#[test]
fn top_five_of_seven() {
    let mut confusion = Confusion::new(7);
    let row = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0f32];
    for label in 0..7 {
        confusion.add(&row, &[label]);
    }
    assert_eq!(confusion.top5_accuracy(), Some(5.0 / 7.0));
    let mut broken = Confusion::new(7);
    broken.add(&[f32::NAN; 7], &[0]);
    assert_eq!(broken.top5_accuracy(), Some(0.0), "NaN is no hit");
}
