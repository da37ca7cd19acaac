//! Reverse-mode differentiation over a dynamic tape.
//!
//! An operation whose input needs a gradient calls `record`: its output then carries a `Node` with the backward rule
//! and edges to the nodes of its inputs. [`Tensor::backward`] visits nodes from the last recorded to the first; a node's
//! gradient is complete when it is reached, since whatever used its output was recorded later. A rule is consumed as it
//! runs, and with it the activations it had kept: memory falls as the pass goes. What needs no gradient records nothing
//! and keeps nothing alive.

mod gradients;

pub use gradients::Gradients;

use crate::cpu;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, TensorId};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Maps the gradient of an operation's output to those of its inputs, in their order. The gradient comes by value, so that
/// a rule may overwrite it. `None` is accepted for inputs that do not need a gradient.
pub type Rule = Box<dyn FnOnce(Tensor, &mut Needs) -> Result<Vec<Option<Tensor>>> + Send>;

/// Which inputs of an operation need a gradient.
pub struct Needs {
    needed: Vec<bool>,
    earlier: Vec<Option<Tensor>>,
}

impl Needs {
    /// The sum of the gradients that other operations have already given for an input: whoever takes it adds its own. What is not taken is
    /// added afterwards, in one more pass over both.
    pub fn take_earlier(&mut self, input: usize) -> Option<Tensor> {
        self.earlier[input].take()
    }
}

impl std::ops::Deref for Needs {
    type Target = [bool];

    fn deref(&self) -> &[bool] {
        &self.needed
    }
}

/// How a tensor came to be, as far as gradients are concerned.
pub(crate) enum History {
    /// A constant.
    None,
    /// A tensor whose gradient is wanted.
    Leaf,
    /// The output of a recorded operation.
    Node(Arc<Node>),
}

/// Where the gradient of an input goes.
pub(crate) enum Edge {
    Leaf(TensorId),
    Node(Arc<Node>),
}

/// A recorded operation.
pub(crate) struct Node {
    /// Order of recording: inputs come before outputs.
    sequence: u64,
    op: &'static str,
    edges: Vec<Option<Edge>>,
    rule: Mutex<Option<Rule>>,
}

impl Drop for Node {
    /// Unlinks long chains one by one: the derived drop would recurse once for each recorded operation.
    fn drop(&mut self) {
        let mut stack: Vec<_> = self.edges.drain(..).collect();
        while let Some(edge) = stack.pop() {
            if let Some(Edge::Node(node)) = edge
                && let Some(mut node) = Arc::into_inner(node)
            {
                stack.append(&mut node.edges);
            }
        }
    }
}

thread_local! {
    static ENABLED: Cell<bool> = const { Cell::new(true) };
}

/// Whether operations of this thread are recorded.
pub fn is_enabled() -> bool {
    ENABLED.get()
}

/// Runs `body` without recording anything.
pub fn no_grad<R>(body: impl FnOnce() -> R) -> R {
    recording_if(false, body)
}

/// Runs `body` on one of the threads that compute, as [`cpu::parallel::on_a_worker`] does, recorded as it would be on this thread.
pub(crate) fn on_a_worker<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    let recording = is_enabled();
    cpu::parallel::on_a_worker(|| recording_if(recording, body))
}

/// Runs `body`, recorded or not, whatever is usual on this thread: it may be another than that of whoever decides.
pub(crate) fn recording_if<R>(recording: bool, body: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ENABLED.set(self.0);
        }
    }
    let _restore = Restore(ENABLED.replace(recording));
    body()
}

/// Gives `output` a history if an input needs a gradient. `rule` is called only then, with the output without history, and
/// captures what the backward pass needs.
pub(crate) fn record(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    rule: impl FnOnce(&Tensor) -> Rule,
) -> Tensor {
    if !inputs.iter().any(|input| input.requires_grad()) {
        return output;
    }
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let node = Node {
        sequence: NEXT.fetch_add(1, Ordering::Relaxed),
        op,
        edges: inputs.iter().map(|input| input.edge()).collect(),
        rule: Mutex::new(Some(rule(&output))),
    };
    output.with_history(History::Node(Arc::new(node)))
}

impl Tensor {
    /// Gradients of this scalar with respect to every leaf it depends on. The graph is freed on the way: a second call is
    /// an error.
    pub fn backward(&self) -> Result<Gradients> {
        if self.numel() != 1 {
            return Err(Error::shape("backward", "a scalar; use backward_with for others", &[self.dims()]));
        }
        self.backward_with(Tensor::full_on(self.device(), self.shape().clone(), 1.0)?)
    }

    /// The product of `seed`, shaped as this tensor, and the Jacobian with respect to every leaf.
    pub fn backward_with(&self, seed: Tensor) -> Result<Gradients> {
        if seed.dims() != self.dims() {
            return Err(Error::shape("backward_with", "a seed shaped as the tensor", &[seed.dims(), self.dims()]));
        }
        let mut gradients = Gradients::default();
        let mut pending: BTreeMap<u64, (Arc<Node>, Tensor)> = BTreeMap::new();
        let mut send = |edge: &Edge, gradient: Tensor, pending: &mut BTreeMap<u64, (Arc<Node>, Tensor)>| {
            match edge {
                Edge::Leaf(id) => gradients.add(*id, gradient)?,
                Edge::Node(node) => {
                    let sum = match pending.remove(&node.sequence) {
                        Some((_, sum)) => gradients::sum(sum, &gradient)?,
                        None => gradient,
                    };
                    pending.insert(node.sequence, (node.clone(), sum));
                }
            }
            Ok::<_, Error>(())
        };
        match self.edge() {
            Some(edge) => send(&edge, seed, &mut pending)?,
            None => return Err(Error::Autograd("backward on a tensor that depends on no leaf".into())),
        }
        while let Some((_, (node, gradient))) = pending.pop_last() {
            let rule = node.rule.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            let rule = rule.ok_or_else(|| {
                Error::Autograd(format!(
                    "the graph at {} was freed by an earlier backward pass; run forward again",
                    node.op
                ))
            })?;
            let earlier = |edge: &Option<Edge>| match edge {
                Some(Edge::Node(node)) => pending.remove(&node.sequence).map(|(_, sum)| sum),
                _ => None,
            };
            let mut needs = Needs {
                needed: node.edges.iter().map(Option::is_some).collect(),
                earlier: node.edges.iter().map(earlier).collect(),
            };
            let inputs = rule(gradient, &mut needs)?;
            debug_assert_eq!(inputs.len(), node.edges.len(), "{}: one gradient an input", node.op);
            for ((edge, gradient), earlier) in node.edges.iter().zip(inputs).zip(needs.earlier) {
                let Some(edge) = edge else { continue };
                for gradient in [earlier, gradient].into_iter().flatten() {
                    send(edge, gradient, &mut pending)?;
                }
            }
        }
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_decides_on_recording_is_not_the_thread() {
        assert!(no_grad(|| recording_if(true, is_enabled)));
        assert!(!no_grad(|| recording_if(true, || no_grad(is_enabled))));
        assert!(!no_grad(|| on_a_worker(is_enabled)) && on_a_worker(is_enabled) && is_enabled());
    }
}
