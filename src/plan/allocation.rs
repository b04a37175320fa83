//! Which tensor gets how many bits: a multiple-choice knapsack.
//!
//! Enters: per group of tensors what each type costs in bytes and in divergence; a budget. Leaves: one choice per group.
//! Pure arithmetic on the numbers given; the same numbers give the same choice.

use nemoconv_formats::GgmlType;

use super::types::fits;

/// A type that a group may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Price {
    /// What it takes in the file.
    pub bytes: u64,
    /// What it adds to the KL divergence, in nats; at least 0.
    pub loss: f64,
}

/// Tensor types that are weighed against each other, by size.
pub const CANDIDATES: [GgmlType; 10] = [
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::IQ4_XS,
    GgmlType::Q4_K,
    GgmlType::IQ4_NL,
    GgmlType::Q5_K,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
];

/// Bits that attention keeps at least: its few weights are read by every later token.
const ATTENTION_BITS: f64 = 4.0;

/// The candidates that can hold the rows of a tensor.
pub fn candidates(columns: u64) -> impl Iterator<Item = GgmlType> {
    CANDIDATES.into_iter().filter(move |ty| fits(*ty, columns))
}

/// Whether a tensor may be given a type without being asked for by name.
pub fn is_allowed(name: &str, ty: GgmlType) -> bool {
    !name.contains(".attn_") || ty.bits_per_weight() >= ATTENTION_BITS
}

/// What tensors that share a type have in common: query, key and value of a block; of all others their name.
pub fn group_of(name: &str) -> String {
    for part in [".attn_q.", ".attn_k.", ".attn_v."] {
        if name.contains(part) {
            return name.replace(part, ".attn_qkv.");
        }
    }
    name.to_string()
}

/// Nodes of the exact search; what it has found by then is kept.
const MAX_NODES: usize = 1 << 20;

/// Chooses a price for every group: the smallest sum of losses whose bytes stay within the budget.
///
/// The convex hull of every group is climbed by the largest decrease of loss per byte, which gives the optimum of the
/// relaxed problem and with it a bound. An exact search over the choices that the bound leaves open spends what remains;
/// it is cut off after a fixed number of steps, so that the result is optimal in practice, not by promise.
///
/// # Errors
/// The smallest number of bytes that is possible, where that is more than the budget.
///
/// # Panics
/// A group without prices.
pub fn allocate(groups: &[Vec<Price>], budget_bytes: u64) -> Result<Vec<usize>, u64> {
    let hulls: Vec<Vec<usize>> = groups.iter().map(|prices| hull(prices)).collect();
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let smallest = total(groups, &chosen).bytes;
    if smallest > budget_bytes {
        return Err(smallest);
    }
    let Some(slope) = climb(groups, &hulls, budget_bytes, &mut chosen) else {
        return Ok(chosen);
    };
    Ok(Search::new(groups, budget_bytes, slope, chosen).run())
}

/// Sum of the chosen prices, in the order of groups.
pub fn total(groups: &[Vec<Price>], chosen: &[usize]) -> Price {
    let chosen = groups
        .iter()
        .zip(chosen)
        .map(|(prices, index)| prices[*index]);
    chosen.fold(
        Price {
            bytes: 0,
            loss: 0.0,
        },
        |sum, price| Price {
            bytes: sum.bytes + price.bytes,
            loss: sum.loss + price.loss,
        },
    )
}

/// The lower convex hull from the cheapest to the best price: indices by ascending bytes and strictly falling loss.
fn hull(prices: &[Price]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..prices.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (prices[a], prices[b]);
        a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss))
    });
    let mut hull: Vec<usize> = Vec::new();
    for index in order {
        let price = prices[index];
        if hull
            .last()
            .is_some_and(|&last| prices[last].loss <= price.loss)
        {
            continue;
        }
        while let [.., first, last] = hull[..]
            && gain_per_byte(prices[first], prices[last]) <= gain_per_byte(prices[last], price)
        {
            hull.pop();
        }
        hull.push(index);
    }
    hull
}

/// What a dearer price saves per byte more.
fn gain_per_byte(from: Price, to: Price) -> f64 {
    match to.bytes - from.bytes {
        0 => f64::INFINITY,
        bytes => (from.loss - to.loss) / bytes as f64,
    }
}

/// Takes upgrades by falling gain as long as they fit, smaller ones behind the first that does not. Gives the gain of that
/// first one: the price of a byte at the budget. `None` where everything fits.
fn climb(
    groups: &[Vec<Price>],
    hulls: &[Vec<usize>],
    budget: u64,
    chosen: &mut [usize],
) -> Option<f64> {
    let steps = groups
        .iter()
        .zip(hulls)
        .enumerate()
        .flat_map(|(group, (prices, hull))| {
            let pairs = hull.windows(2);
            pairs.map(move |pair| {
                (
                    gain_per_byte(prices[pair[0]], prices[pair[1]]),
                    group,
                    pair[0],
                    pair[1],
                )
            })
        });
    let mut steps: Vec<_> = steps.collect();
    // Stable: equal gains keep the order of groups, and a hull's own steps fall strictly.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut bytes = total(groups, chosen).bytes;
    let mut slope = None;
    for (gain, group, from, to) in steps {
        let more = groups[group][to].bytes - groups[group][from].bytes;
        if chosen[group] == from && bytes + more <= budget {
            chosen[group] = to;
            bytes += more;
        } else if slope.is_none() {
            slope = Some(gain);
        }
    }
    slope
}

/// One group of the exact search: only what the bound leaves open.
struct Open {
    group: usize,
    /// Index, bytes, loss, and how much dearer than the group's best at the price of a byte; the last ascending.
    choices: Vec<(usize, Price, f64)>,
}

/// Depth first, with the bound of the relaxed problem.
struct Search {
    open: Vec<Open>,
    /// Least bytes of the open groups from each on.
    least_bytes: Vec<u64>,
    budget: u64,
    /// Of the relaxed problem: no choice has less loss.
    bound: f64,
    best_loss: f64,
    best: Vec<usize>,
    current: Vec<usize>,
    nodes: usize,
}

impl Search {
    fn new(groups: &[Vec<Price>], budget: u64, slope: f64, chosen: Vec<usize>) -> Self {
        let priced = |price: &Price| price.loss + slope * price.bytes as f64;
        let least = |prices: &[Price]| prices.iter().map(priced).fold(f64::INFINITY, f64::min);
        let bound = groups.iter().map(|prices| least(prices)).sum::<f64>() - slope * budget as f64;
        let best_loss = total(groups, &chosen).loss;
        let mut open: Vec<Open> = Vec::new();
        for (group, prices) in groups.iter().enumerate() {
            let least = least(prices);
            let choices = prices
                .iter()
                .enumerate()
                .map(|(index, price)| (index, *price, priced(price) - least));
            // What is chosen already stays open, whatever rounding makes of the bound.
            let is_open = |(index, _, excess): &(usize, Price, f64)| {
                *index == chosen[group] || bound + excess < best_loss
            };
            let mut choices: Vec<_> = choices.filter(is_open).collect();
            choices.sort_by(|a, b| a.2.total_cmp(&b.2));
            open.push(Open { group, choices });
        }
        // Large groups first: what they leave is filled by small ones.
        open.sort_by_key(|open| {
            std::cmp::Reverse(open.choices.iter().map(|choice| choice.1.bytes).max())
        });
        let mut least_bytes = vec![0; open.len() + 1];
        for (at, open) in open.iter().enumerate().rev() {
            let least = open
                .choices
                .iter()
                .map(|choice| choice.1.bytes)
                .min()
                .unwrap_or(0);
            least_bytes[at] = least_bytes[at + 1] + least;
        }
        let current = chosen.clone();
        Self {
            open,
            least_bytes,
            budget,
            bound,
            best_loss,
            best: chosen,
            current,
            nodes: 0,
        }
    }

    fn run(mut self) -> Vec<usize> {
        self.descend(
            0,
            Price {
                bytes: 0,
                loss: 0.0,
            },
            0.0,
        );
        self.best
    }

    fn descend(&mut self, at: usize, spent: Price, excess: f64) {
        if at == self.open.len() {
            if spent.loss < self.best_loss {
                self.best_loss = spent.loss;
                self.best.clone_from(&self.current);
            }
            return;
        }
        for choice in 0..self.open[at].choices.len() {
            self.nodes += 1;
            let (index, price, more) = self.open[at].choices[choice];
            if self.nodes > MAX_NODES || self.bound + excess + more >= self.best_loss {
                return;
            }
            let spent = Price {
                bytes: spent.bytes + price.bytes,
                loss: spent.loss + price.loss,
            };
            if spent.bytes + self.least_bytes[at + 1] <= self.budget {
                self.current[self.open[at].group] = index;
                self.descend(at + 1, spent, excess + more);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prices(list: &[(u64, f64)]) -> Vec<Price> {
        list.iter()
            .map(|&(bytes, loss)| Price { bytes, loss })
            .collect()
    }

    /// The least loss of all choices within the budget.
    fn brute_force(groups: &[Vec<Price>], budget: u64) -> Option<f64> {
        let mut sums = vec![Price {
            bytes: 0,
            loss: 0.0,
        }];
        for prices in groups {
            let add = |sum: &Price| {
                let sum = *sum;
                prices.iter().map(move |price| Price {
                    bytes: sum.bytes + price.bytes,
                    loss: sum.loss + price.loss,
                })
            };
            sums = sums.iter().flat_map(add).collect();
        }
        let within = sums.iter().filter(|sum| sum.bytes <= budget);
        within.map(|sum| sum.loss).min_by(f64::total_cmp)
    }

    /// A fixed sequence that looks random, below `end`.
    fn sequence(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut state = seed;
        move |end| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % end
        }
    }

    #[test]
    fn the_hull_leaves_out_what_lies_above_it() {
        let check = |list: &[(u64, f64)], expected: &[usize]| {
            assert_eq!(hull(&prices(list)), expected, "{list:?}")
        };
        check(&[(10, 8.0), (20, 4.0), (30, 2.0)], &[0, 1, 2]);
        check(&[(10, 8.0), (20, 7.0), (30, 2.0)], &[0, 2]);
        check(&[(30, 2.0), (10, 8.0), (20, 9.0)], &[1, 0]);
        check(&[(10, 8.0), (10, 5.0)], &[1]);
        check(&[(10, 8.0), (20, 6.0), (30, 4.0)], &[0, 2]);
        check(&[(10, 0.0)], &[0]);
    }

    #[test]
    fn nothing_beats_the_choice() {
        for seed in 0..200 {
            let mut next = sequence(seed);
            let groups: Vec<_> = (0..6)
                .map(|_| {
                    let (mut bytes, mut loss) = (next(50) + 1, next(1000) as f64 + 500.0);
                    let step = |_| {
                        bytes += next(40) + 1;
                        loss *= 0.2 + 0.7 * next(100) as f64 / 100.0;
                        Price { bytes, loss }
                    };
                    (0..5).map(step).collect::<Vec<_>>()
                })
                .collect();
            let budget = 200 + next(900);
            let found = allocate(&groups, budget).map(|chosen| total(&groups, &chosen));
            match brute_force(&groups, budget) {
                None => assert!(found.unwrap_err() > budget),
                Some(loss) => {
                    let found = found.unwrap();
                    assert!(
                        found.bytes <= budget && (found.loss - loss).abs() < 1e-9,
                        "{seed}: {found:?} {loss}"
                    );
                }
            }
        }
    }

    #[test]
    fn many_groups_fill_the_budget() {
        let mut next = sequence(1);
        let groups: Vec<_> = (0..250)
            .map(|_| {
                let (weights, gain) = (1000 + next(100_000), 1.0 + next(1000) as f64);
                let bits = [2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5];
                let price = |bits: f64| Price {
                    bytes: (weights as f64 * bits) as u64,
                    loss: gain * 4f64.powf(-bits),
                };
                bits.into_iter().map(price).collect::<Vec<_>>()
            })
            .collect();
        let cheapest: u64 = groups.iter().map(|prices| prices[0].bytes).sum();
        let budget = cheapest * 17 / 10;
        let found = total(&groups, &allocate(&groups, budget).unwrap());
        assert!(
            found.bytes <= budget && budget - found.bytes < budget / 10_000,
            "{found:?} {budget}"
        );
    }

    #[test]
    fn a_budget_below_the_smallest_says_the_smallest() {
        let groups = [prices(&[(10, 1.0), (5, 2.0)]), prices(&[(7, 0.0)])];
        assert_eq!(allocate(&groups, 11), Err(12));
        assert_eq!(allocate(&groups, 12), Ok(vec![1, 0]));
        assert_eq!(allocate(&groups, 1000), Ok(vec![0, 0]));
    }

    #[test]
    fn query_key_and_value_share_a_group_and_keep_four_bits() {
        assert_eq!(
            group_of("blk.3.attn_k.weight"),
            group_of("blk.3.attn_q.weight")
        );
        assert_ne!(
            group_of("blk.3.attn_k.weight"),
            group_of("blk.5.attn_k.weight")
        );
        assert_eq!(
            group_of("blk.3.attn_output.weight"),
            "blk.3.attn_output.weight"
        );
        assert!(!is_allowed("blk.3.attn_v.weight", GgmlType::Q3_K));
        assert!(is_allowed("blk.3.attn_v.weight", GgmlType::IQ4_XS));
        assert!(is_allowed("blk.3.ffn_up.weight", GgmlType::Q2_K));
        let small_blocks: Vec<_> = candidates(2688).collect();
        assert_eq!(
            small_blocks,
            [
                GgmlType::IQ4_NL,
                GgmlType::Q5_0,
                GgmlType::Q5_1,
                GgmlType::Q8_0
            ]
        );
    }
}
