use crate::support::*;
use hone::Tensor;
use hone::autograd::no_grad;
use hone::nn::Parameter;
use hone::ops::{add, matmul, relu, scale, sum};

#[test]
fn a_tensor_used_twice_collects_both_gradients() {
    let x = tensor(&[4], 1).leaf();
    let y = add(&scale(&x, 2.0).unwrap(), &scale(&x, 5.0).unwrap()).unwrap();
    let z = sum(&add(&y, &x).unwrap()).unwrap();
    assert_eq!(z.backward().unwrap().get(&x).unwrap().to_vec::<f32>(), [8.0; 4]);
}

#[test]
fn a_ladder_of_diamonds_is_walked_once() {
    // Each rung doubles; a walk along every path would take 2^40 steps.
    let x = tensor(&[1], 1).leaf();
    let mut y = x.clone();
    for _ in 0..40 {
        y = add(&y, &y).unwrap();
    }
    assert_eq!(y.backward().unwrap().get(&x).unwrap().item().unwrap(), 2f32.powi(40));
}

#[test]
fn long_chains_neither_recurse_nor_leak() {
    let x = tensor(&[1], 1).leaf();
    let chain = || (0..200_000).fold(x.clone(), |y, _| scale(&y, 1.0).unwrap());
    drop(chain());
    assert_eq!(chain().backward().unwrap().get(&x).unwrap().item().unwrap(), 1.0);
}

#[test]
fn the_graph_is_freed_by_the_backward_pass() {
    let x = tensor(&[2, 2], 1).leaf();
    let y = sum(&relu(&x).unwrap()).unwrap();
    y.backward().unwrap();
    let error = y.backward().err().unwrap();
    assert!(error.to_string().contains("freed"), "{error}");
}

#[test]
fn nothing_is_recorded_without_need() {
    let x = tensor(&[2, 2], 1);
    assert!(!relu(&x).unwrap().requires_grad());
    assert!(sum(&x).unwrap().backward().is_err());
    let leaf = x.leaf();
    assert!(relu(&leaf).unwrap().requires_grad());
    assert!(!no_grad(|| relu(&leaf).unwrap()).requires_grad());
    assert!(relu(&leaf).unwrap().requires_grad(), "no_grad ends with its scope");
    assert!(!relu(&relu(&leaf).unwrap().detach()).unwrap().requires_grad());
}

#[test]
fn updates_leave_tensors_taken_earlier_alone() {
    let parameter = Parameter::new("p", tensor(&[3], 1));
    parameter.set_trainable(true);
    let before = parameter.tensor();
    let copy = before.to_vec::<f32>();
    parameter.update(|p| p.fill(7.0));
    assert_eq!(before.to_vec::<f32>(), copy);
    assert_eq!(parameter.tensor().to_vec::<f32>(), [7.0; 3]);
    assert_eq!(parameter.tensor().id(), before.id());
    let gradients = sum(&parameter.tensor()).unwrap().backward().unwrap();
    assert!(gradients.by_id(parameter.id()).is_some());
}

#[test]
fn seeds_must_fit() {
    let y = matmul(&tensor(&[2, 3], 1).leaf(), &tensor(&[3, 2], 2)).unwrap();
    assert!(y.backward().is_err(), "not a scalar");
    assert!(y.backward_with(Tensor::zeros([2, 3])).is_err());
}
