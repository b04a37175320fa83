//! Backwards through `max(x, 0)^2`.

/// Turns the gradient at the output into `gradient * 2 max(x, 0)`.
pub fn relu_squared(input: &[f32], gradient: &mut [f32]) {
    let values = gradient.iter_mut().zip(input);
    values.for_each(|(gradient, x)| *gradient *= 2.0 * x.max(0.0));
}

#[cfg(test)]
mod tests {
    use super::super::differences::{check, dot, values};
    use super::*;

    #[test]
    fn it_is_the_derivative() {
        let (input, weights) = (values(40, 1), values(40, 2));
        let mut gradient = weights.clone();
        relu_squared(&input, &mut gradient);
        check(&input, &gradient, |x| {
            let squared: Vec<f64> = x.iter().map(|x| x.max(0.0).powi(2)).collect();
            dot(&squared, &weights)
        });
    }
}
