// swift-tools-version: 5.10
import PackageDescription

let package = Package(
    name: "generate",
    platforms: [.macOS(.v14), .iOS(.v17)],
    dependencies: [.package(url: "https://github.com/ml-explore/mlx-swift", from: "0.31.6")],
    targets: [.executableTarget(name: "generate", dependencies: [.product(name: "MLX", package: "mlx-swift")])]
)
