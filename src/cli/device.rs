//! Where networks run: `--device`, `--device-mem`, and `devices`.

use std::str::FromStr;

use clap::Args;
use nemoconv::backend::Machines;
use nemoconv::error::{Error, Result};
#[cfg(feature = "device")]
use {
    super::output::{human_bytes, print_stdout, table},
    nemoconv::backend::device::OpenDevice,
    nemoconv_device::{
        Description, Device, DeviceError, DeviceName, Found, Traffic, devices, open,
    },
    serde_json::json,
    std::sync::Arc,
};

use nemoconv::plan::recipe::parse_size;

use super::output::Talk;

/// Where networks run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Where the network is run: cpu, wgpu or cuda, with the number of a device (`wgpu:1`), or auto: the first GPU there
    /// is, else the CPU. `nemoconv devices` lists them. Several (`cuda:0,cuda:1`) share its blocks, or its experts
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = WantedDevice::from_str)]
    pub device: WantedDevice,
    /// Memory of the device to stay within, such as 8G: weights that do not fit are sent tile by tile. Default: all of it
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub device_mem: Option<u64>,
}

/// Flags of `devices`.
#[derive(Debug, Args)]
pub struct Devices {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

/// `--device`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WantedDevice {
    Cpu,
    Auto,
    #[cfg(feature = "device")]
    Named(Vec<DeviceName>),
}

impl FromStr for WantedDevice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            #[cfg(feature = "device")]
            names => {
                let names = names.split(',').map(DeviceName::from_str);
                Ok(Self::Named(names.collect::<std::result::Result<_, _>>()?))
            }
            #[cfg(not(feature = "device"))]
            name => Err(format!("`{name}`: this build runs on the CPU alone")),
        }
    }
}

/// Runs `work` on what was asked for. Where a device runs out of memory, the CPU does it again, and whatever fails of one that
/// nobody asked for.
pub fn on_device<T>(
    args: &DeviceArgs,
    talk: &Talk,
    work: impl Fn(&Machines) -> Result<T>,
) -> Result<T> {
    let machines = machines(args, talk)?;
    let done = work(&machines);
    report(&machines, talk);
    match done {
        #[cfg(feature = "device")]
        Err(Error::Device(error)) if does_cpu_go_on(args, &error) => {
            talk.say(format_args!("{error}: going on on the CPU"));
            work(&Machines::Cpu)
        }
        done => done,
    }
}

/// What each device did, and what went over its border.
#[cfg(feature = "device")]
fn report(machines: &Machines, talk: &Talk) {
    let Machines::Devices(all) = machines else {
        return;
    };
    for (index, open) in all.iter().enumerate() {
        let whose = match all.len() {
            1 => String::new(),
            _ => format!("device {index}: "),
        };
        let Traffic {
            sent,
            fetched,
            given_up,
        } = open.device().traffic();
        let [sent, fetched] = [sent, fetched].map(human_bytes);
        let gave_way = match given_up {
            0 => String::new(),
            count => format!("; weights that gave way, and were sent for every product: {count}"),
        };
        talk.say(format_args!(
            "{whose}{}; {sent} sent, {fetched} fetched{gave_way}",
            open.tally()
        ));
    }
}

#[cfg(not(feature = "device"))]
fn report(_: &Machines, _: &Talk) {}

#[cfg(feature = "device")]
fn does_cpu_go_on(args: &DeviceArgs, error: &DeviceError) -> bool {
    args.device == WantedDevice::Auto || matches!(error, DeviceError::OutOfMemory { .. })
}

#[cfg(not(feature = "device"))]
fn machines(args: &DeviceArgs, talk: &Talk) -> Result<Machines> {
    if args.device == WantedDevice::Auto {
        talk.say("running on the CPU: this build knows no devices");
    }
    Ok::<_, Error>(Machines::Cpu)
}

#[cfg(feature = "device")]
fn machines(args: &DeviceArgs, talk: &Talk) -> Result<Machines> {
    let drivers = match &args.device {
        WantedDevice::Cpu => return Ok(Machines::Cpu),
        WantedDevice::Named(names) => {
            let drivers = names.iter().map(|name| open(*name));
            drivers.collect::<nemoconv_device::Result<Vec<_>>>()?
        }
        WantedDevice::Auto => match first_gpu(talk) {
            Some(driver) => vec![driver],
            None => return Ok(Machines::Cpu),
        },
    };
    let opened = drivers.into_iter().map(|driver| {
        let Description { name, detail, .. } = driver.description();
        talk.say(format_args!("running on {name}, {detail}"));
        let device = Device::new(driver, args.device_mem);
        Arc::new(OpenDevice::new(device))
    });
    Ok(Machines::Devices(opened.collect()))
}

/// The first device that is no processor and can be opened; whatever is wrong with others is said, and is no error.
#[cfg(feature = "device")]
fn first_gpu(talk: &Talk) -> Option<Box<dyn nemoconv_device::Driver>> {
    for Found { family, devices } in devices() {
        let found = devices.unwrap_or_else(|error| {
            talk.detail(&error);
            Vec::new()
        });
        for (index, _) in found.iter().enumerate().filter(|(_, d)| !d.is_software) {
            match open(DeviceName { family, index }) {
                Ok(driver) => return Some(driver),
                Err(error) => talk.say(&error),
            }
        }
    }
    talk.say("running on the CPU: there is no GPU");
    None
}

/// Lists every device, and why a driver has none.
#[cfg(feature = "device")]
pub fn list(args: &Devices) -> Result<()> {
    let found = devices();
    if args.json {
        let all: Vec<_> = found.iter().map(found_json).collect();
        print_stdout(json!({ "devices": all.concat() }));
        return Ok(());
    }
    let header = [
        "device",
        "name",
        "driver",
        "binding",
        "allocation",
        "memory",
        "group",
    ];
    let mut rows = vec![header.map(str::to_string).to_vec()];
    for Found { family, devices } in &found {
        match devices {
            Err(error) => rows.push(vec![family.name().into(), error.to_string()]),
            Ok(devices) if devices.is_empty() => {
                rows.push(vec![family.name().into(), "no device".into()]);
            }
            Ok(devices) => rows.extend(
                devices
                    .iter()
                    .enumerate()
                    .map(|(index, device)| row(index, device)),
            ),
        }
    }
    print_stdout(table(&rows, &[false, false, false, true, true, true, true]));
    Ok(())
}

#[cfg(not(feature = "device"))]
pub fn list(_: &Devices) -> Result<()> {
    super::output::print_stdout("this build runs on the CPU alone");
    Ok(())
}

#[cfg(feature = "device")]
fn row(index: usize, device: &Description) -> Vec<String> {
    let name = DeviceName {
        family: device.family,
        index,
    };
    let limits = &device.limits;
    vec![
        name.to_string(),
        device.name.clone(),
        device.detail.clone(),
        human_bytes(limits.view_bytes),
        human_bytes(limits.allocation_bytes),
        limits.memory_bytes.map_or("?".into(), human_bytes),
        limits.group_threads.to_string(),
    ]
}

#[cfg(feature = "device")]
fn found_json(found: &Found) -> Vec<serde_json::Value> {
    let family = found.family;
    match &found.devices {
        Err(error) => vec![json!({ "family": family.name(), "error": error.to_string() })],
        Ok(devices) => {
            let device = |(index, device): (usize, &Description)| {
                json!({
                    "family": family.name(),
                    "device": DeviceName { family, index }.to_string(),
                    "name": device.name,
                    "driver": device.detail,
                    "is_software": device.is_software,
                    "binding_bytes": device.limits.view_bytes,
                    "allocation_bytes": device.limits.allocation_bytes,
                    "memory_bytes": device.limits.memory_bytes,
                    "group_threads": device.limits.group_threads,
                })
            };
            devices.iter().enumerate().map(device).collect()
        }
    }
}

/// The exit code of an error, where devices have their own.
#[cfg(feature = "device")]
pub fn exit_code(error: &Error) -> Option<u8> {
    let Error::Device(error) = error else {
        return None;
    };
    Some(match error {
        DeviceError::NoDriver { .. } | DeviceError::NotBuilt { .. } => 70,
        DeviceError::NoDevice { .. } => 71,
        DeviceError::NoCompiler => 72,
        DeviceError::UnsupportedArchitecture { .. } => 73,
        DeviceError::OutOfMemory { .. } => 74,
        DeviceError::Lost { .. } => 75,
        DeviceError::LimitTooSmall { .. } => 76,
        _ => return None,
    })
}

#[cfg(not(feature = "device"))]
pub fn exit_code(_: &Error) -> Option<u8> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "device")]
    #[test]
    fn what_fails_of_devices_has_codes_of_its_own() {
        let (family, device, library) = ("cuda", String::new(), "");
        let errors = [
            DeviceError::NoDriver { family, library },
            DeviceError::NoDevice { family, index: 0 },
            DeviceError::NoCompiler,
            DeviceError::UnsupportedArchitecture {
                device: device.clone(),
                architecture: String::new(),
            },
            DeviceError::OutOfMemory { bytes: 1 },
            DeviceError::Lost {
                reason: String::new(),
            },
            DeviceError::LimitTooSmall {
                device,
                what: "",
                found: 0,
                needed: 1,
            },
        ];
        let codes = errors.map(|error| exit_code(&Error::Device(error)));
        assert_eq!(codes, [70, 71, 72, 73, 74, 75, 76].map(Some));
    }

    #[test]
    fn devices_have_names() {
        let check = |text: &str| WantedDevice::from_str(text);
        assert_eq!(check("cpu"), Ok(WantedDevice::Cpu));
        assert_eq!(check("auto"), Ok(WantedDevice::Auto));
        assert!(check("gpu").is_err());
        #[cfg(feature = "device")]
        {
            let named = check("wgpu:2,cuda");
            assert!(matches!(named, Ok(WantedDevice::Named(names)) if names[0].index == 2));
            assert!(check("cuda:x").unwrap_err().contains("no index"));
        }
    }
}
