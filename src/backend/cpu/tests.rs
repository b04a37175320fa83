//! The whole network on every instruction set: the same bits.

use std::sync::Arc;

use nemoconv_fixtures::checkpoint::cases;

use super::kernels::Isa;
use super::{Cpu, Residence};
use crate::artifact::StoredModel;
use crate::calibrate::second_moments::{CrossMoments, SecondMoments};
use crate::error::Result;
use crate::forward::network::{Network, Sequence};
use crate::forward::numerics::Numerics;
use crate::forward::observer::{Observer, Silent};
use crate::rewrite::RewrittenModel;

/// All but the portable twin, which has no fused products.
fn fused() -> Vec<Isa> {
    let all = Isa::all().into_iter();
    all.filter(|isa| *isa != Isa::Portable).collect()
}

/// Everything that blocks read and write, in order.
#[derive(Default)]
struct Everything(Vec<(String, Vec<f32>)>);

impl Observer<Cpu> for Everything {
    fn residual(&mut self, block: usize, _: &Cpu, residual: &Vec<f32>, _: usize) -> Result<()> {
        self.0
            .push((format!("stream before block {block}"), residual.clone()));
        Ok(())
    }

    fn input(
        &mut self,
        tensor: &str,
        matrix: usize,
        _: &Cpu,
        input: &Vec<f32>,
        _: usize,
    ) -> Result<()> {
        self.0.push((format!("{tensor} {matrix}"), input.clone()));
        Ok(())
    }
}

/// Two sequences together, then one token of the first.
fn run(model: &Arc<StoredModel>, isa: Isa) -> Vec<(String, Vec<f32>)> {
    let backend = Cpu::new(Arc::clone(model), Residence::Mapped).with_isa(isa);
    let network = Network::open(model, backend, &Numerics::EXACT).unwrap();
    let vocab_size = model.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..180).map(|i| (i * 7919 + 13) % vocab_size).collect();
    let (first, second) = tokens.split_at(113);
    let [mut one, mut two] = [(); 2].map(|()| network.empty_state().unwrap());
    let mut sequences = [
        Sequence {
            tokens: first,
            state: &mut one,
        },
        Sequence {
            tokens: second,
            state: &mut two,
        },
    ];
    let mut seen = Everything::default();
    let normed = network.run(&mut sequences, &mut seen).unwrap();
    let rows: Vec<u32> = (0..180).collect();
    let logits = network.logits(&normed, &rows, &mut Silent).unwrap();
    seen.0.push(("logits".to_owned(), logits));
    let mut next = [Sequence {
        tokens: &[5],
        state: &mut one,
    }];
    let normed = network.run(&mut next, &mut seen).unwrap();
    seen.0.push(("one token".to_owned(), normed));
    seen.0
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// With weights as they are stored, and as F32.
#[track_caller]
fn check(name: &str, model: &Arc<StoredModel>) {
    let plain = RewrittenModel::new(Arc::clone(model), Arc::default());
    compare(
        &format!("{name} in F32"),
        &Arc::new(plain.materialize().unwrap()),
    );
    compare(name, model);
}

#[track_caller]
fn compare(name: &str, model: &Arc<StoredModel>) {
    let machines = fused();
    let runs: Vec<_> = machines.iter().map(|isa| run(model, *isa)).collect();
    for (isa, other) in machines.iter().zip(&runs).skip(1) {
        assert_eq!(runs[0].len(), other.len());
        for ((what, a), (_, b)) in runs[0].iter().zip(other) {
            assert!(
                bits(a) == bits(b),
                "{name}: {what} differs between {:?} and {isa:?}",
                machines[0]
            );
        }
    }
}

#[test]
fn the_network_computes_the_same_bits_on_every_instruction_set() {
    let nano = nemoconv_fixtures::nano();
    let open = |path: &str| Arc::new(StoredModel::open(path).unwrap());
    check("nano", &open(nano.to_str().unwrap()));
    for case in cases() {
        let folder = tempfile::tempdir().unwrap();
        let path = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        check(case.name, &open(path.to_str().unwrap()));
    }
}

#[test]
fn second_moments_are_the_same_bits_on_every_instruction_set() {
    let n = 77;
    let rows: Vec<f32> = (0..700 * n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 8.0)
        .collect();
    let weights: Vec<f32> = (0..700).map(|i| (i % 11) as f32 / 7.0).collect();
    let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap());
    let model = Arc::new(model.unwrap());
    let later = rows[n..].to_vec();
    let found = |isa: Isa| {
        let cpu = Cpu::new(Arc::clone(&model), Residence::Mapped).with_isa(isa);
        let mut moments = SecondMoments::empty(n);
        moments.add_on(&cpu, &rows, Some(&weights)).unwrap();
        let cross = CrossMoments::of_on(&cpu, (&rows, n), (&later, n)).unwrap();
        let sums = moments.sums.into_iter().chain(cross.sums);
        sums.map(f64::to_bits).collect::<Vec<_>>()
    };
    let all: Vec<_> = fused().into_iter().map(found).collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}
