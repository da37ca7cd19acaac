//! Work in parallel and ahead, handed over in order.

use hone::data::ordered_parallel;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn results_come_in_order() {
    for threads in 1..=4 {
        for ahead in [1, 3, 100] {
            let got: Vec<usize> = ordered_parallel(200, threads, ahead, |i| {
                if i % 7 == 0 {
                    std::thread::yield_now();
                }
                i * i
            })
            .collect();
            assert_eq!(got, (0..200).map(|i| i * i).collect::<Vec<_>>());
        }
    }
    assert_eq!(ordered_parallel(0, 3, 2, |i| i).count(), 0);
}

#[test]
fn no_more_is_done_ahead_than_allowed_and_dropping_stops() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counter = begun.clone();
    let mut items = ordered_parallel(1000, 3, 5, move |i| {
        counter.fetch_add(1, Ordering::SeqCst);
        i
    });
    assert_eq!(items.next(), Some(0));
    drop(items);
    assert!(begun.load(Ordering::SeqCst) <= 6, "one taken, five ahead");
}

#[test]
fn a_panic_reaches_whoever_takes_the_result() {
    let mut items = ordered_parallel(4, 2, 2, |i| if i == 1 { panic!("item {i}") } else { i });
    assert_eq!(items.next(), Some(0));
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| items.next()));
    assert!(caught.is_err());
    assert_eq!(items.next(), Some(2));
}
